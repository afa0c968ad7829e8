"""How a program travels to a server: its size, its dtypes, and what it may not contain."""
