"""Domain-generalized semantic segmentation: fit on one domain, judge on others that were never shown (extra `train`)."""
