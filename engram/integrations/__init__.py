"""Model libraries whose resident tables can be replaced by one of ours."""
