"""Changes of single images, and mixtures of two: what data.augment lists after a crop."""
