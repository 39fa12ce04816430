"""The bundle room: the artifact that export writes and the service opens. Knows neither torch nor
HTTP.
"""
