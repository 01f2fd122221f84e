"""EE-Tuning (arXiv 2402.00518): only exits are trained."""
