# SPDX-License-Identifier: Apache-2.0
"""Read files of audio and video: containers, damage, timelines, decoders.

``audio.py`` is the front of this folder; nothing here knows of models, engines or servers.
"""
