"""sago"""
