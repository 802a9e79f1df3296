"""Old-policy anchors: whose log-probs stand in the ratio's denominator. One anchor a file."""
