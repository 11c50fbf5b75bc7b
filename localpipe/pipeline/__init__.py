"""The runtime: channels between stages, stages, the workers that host them, their launch."""
