"""algorithms/losses"""
