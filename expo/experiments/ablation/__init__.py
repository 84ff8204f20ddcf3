"""Which part of the method helps: arms, pools and seeds as ordinary runs, compared in pairs."""
