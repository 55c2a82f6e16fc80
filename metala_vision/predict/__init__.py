"""`metala-vision predict`: what a classifier takes images for."""
