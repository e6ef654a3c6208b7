"""Segmentation with SAM: images with masks, the encoder ranked, the mask decoder trained."""
