"""The lab: small problems where everything is known, and the exact bias and variance of every correction in them."""
