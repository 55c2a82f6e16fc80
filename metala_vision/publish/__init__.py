"""`metala-vision weights`: list, download, verify and publish pretrained weights."""
