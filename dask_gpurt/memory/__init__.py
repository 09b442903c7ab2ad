"""The tiered store: what a worker holds, in which tier, and what moves when room is needed."""
