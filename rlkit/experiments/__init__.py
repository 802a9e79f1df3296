"""Several runs: start them (sweep) and compare them."""
