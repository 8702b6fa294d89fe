"""Any loss that is a sum over examples, read by its graph."""
