"""Finders: what every method that makes a schedule is made of: profiles, work, budgets and training."""

from l2c_compile.finders.budget import Found, for_budget, within_budget
from l2c_compile.finders.formulas import alternate_evaluations
from l2c_compile.finders.latent_data import LatentData
from l2c_compile.finders.profile import Profile, take_profile
from l2c_compile.finders.work import Work

__all__ = [
    "Found",
    "LatentData",
    "Profile",
    "Work",
    "alternate_evaluations",
    "for_budget",
    "take_profile",
    "within_budget",
]
