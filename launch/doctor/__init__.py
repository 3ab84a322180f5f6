"""`thinwire doctor`: what is here, what is missing, what that prevents, and where ranks differ. Works without torch."""
