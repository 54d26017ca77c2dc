"""Does the store keep its promise? Recorded histories of real clients, and the check that they are linearizable.

A client writes what it asked and what it was answered to a file of its own (`history`, `recorder`); `linearizability` looks
for an order in which one record after another, doing one operation at a time (`model`), gives exactly these answers.
"""
