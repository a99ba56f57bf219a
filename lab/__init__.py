"""The local hosts: real systemd machines in containers, on one Linux machine."""
