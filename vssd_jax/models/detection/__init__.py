"""The parts of a detector: small functions of arrays with fixed shapes, and the heads."""
