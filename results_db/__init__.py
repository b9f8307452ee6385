"""The results database: rows in, rows out. Imports nothing else of QuantArena."""
