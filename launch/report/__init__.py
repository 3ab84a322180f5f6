"""`thinwire report`: runs from their folders, side by side as a table, curves and one HTML page. Imports no torch."""
