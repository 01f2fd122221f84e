"""How tokens come about: when an exit gives one, and what the heads draft, verify and sample."""
