"""POA: pre-train once, ship every size."""
