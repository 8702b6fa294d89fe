"""Advice beyond its formulas: what optimizers and past runs say, tables, and the command line. No Trainer."""
