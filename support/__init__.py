"""What the six scripts lean on; a reader of the method can skip it."""
