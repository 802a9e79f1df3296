"""algorithms/old_policy"""
