"""Text as tokens: the bytes of files, and files of numbers that a tokenizer has written."""
