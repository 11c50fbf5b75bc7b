"""Images of scenes with the class of every pixel, of which training sees scaled crops."""
