"""Pictures and captions on a disk to samples that can be trained on: survey, pixels, caches, order."""
