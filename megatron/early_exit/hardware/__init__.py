"""What this machine can do, found by measuring it or by asking the system, never by its name.

`dtypes` says in which number formats it multiplies fast, `resources` how many cores and how much
memory this process may use. Everything in the package may ask, and nothing is changed here."""
