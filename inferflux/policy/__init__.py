"""What administrators decide: the policy document, its sections, its signature."""
