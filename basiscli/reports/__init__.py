"""What a run says about itself: its report, and the page, pictures and model card made of it."""
