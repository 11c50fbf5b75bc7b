"""Folders of image files: the training and test images, and the test images alone."""
