"""GT-Pair: real clips as chosen, videos generated for their captions as rejected (Reg-DPO)."""
