from setuptools import find_packages, setup

setup(packages=find_packages(include=["padkern", "padkern.*"]), cmake_source_dir=".")
