"""Pictures and videos: from whatever the user names to the tiles that the vision tower reads."""
