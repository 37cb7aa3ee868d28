# What many scripts start with.
import argparse
import base64
import collections
import csv
import dataclasses
import hashlib
import json
import logging
import re
import shutil
import socket
import subprocess
import tempfile

print(len(argparse.__doc__), len(json.__doc__), base64, collections, csv, dataclasses, hashlib, logging, re, shutil, socket, subprocess, tempfile)
