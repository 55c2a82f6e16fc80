"""`metala-vision probe`: synthetic tasks that show what a token mixer can do."""
