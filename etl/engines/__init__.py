"""One module an engine: each fits the same state from the same training rows."""
