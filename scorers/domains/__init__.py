"""How much of each group a mixture shall have: shares of tokens, from counts, rules or models."""
