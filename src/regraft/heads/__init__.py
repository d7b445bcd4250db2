"""Score how much each attention head matters for safety: Ships and query-level KL."""
