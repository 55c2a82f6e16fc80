"""`metala-vision features`: how much a model's frozen features tell about classes."""
