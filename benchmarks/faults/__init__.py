"""Whether verdicts name the failures that are injected into healthy training runs, and are silent without them."""
