"""How much each weight matters: one streaming accumulator and one score a criterion."""
