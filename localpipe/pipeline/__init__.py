"""The runtime: channels between stages, the stages, the workers that host them, and their launch."""
