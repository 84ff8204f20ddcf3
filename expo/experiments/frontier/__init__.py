"""The frontier plan: does EXPO raise pass@32 on questions that the initial model seldom solves?"""
