"""Plans and what runs them."""
