"""Training clips for pocket: ViZDoom renders Freedoom rooms while the player keeps to one steady motion.

Frames are rendered at 400x300, cropped to 384x256 and averaged over 2x2 pixels to 192x128, so textures are not
aliased. Motion is slow, half a token to one token a frame, which is what a model of this size learns in minutes.
Clips in which a wall blocked the player or filled the view are dropped. ViZDoom is MIT, Freedoom's data BSD-3-Clause.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from .prompts import MOTIONS, SCENES

SCENARIOS = {
    "round arena": "defend_the_center",
    "green yard": "health_gathering",
    "stone corridor": "deadly_corridor",
    "cage hall": "basic",
    "brick hall": "take_cover",
    "lamp hall": "predict_position",
}
HEIGHT, WIDTH = 128, 192
TURN = 1.5  # degrees a frame
TICS = 1  # game tics a frame, at 35 tics a second
# Buttons: move forward, move backward, step left, step right, turn by degrees (positive is right).
ACTIONS = {
    "walk forward": (1, 0, 0, 0, 0.0),
    "walk backward": (0, 1, 0, 0, 0.0),
    "turn left": (0, 0, 0, 0, -TURN / TICS),
    "turn right": (0, 0, 0, 0, TURN / TICS),
    "step left": (0, 0, 1, 0, 0.0),
    "step right": (0, 0, 0, 1, 0.0),
}
LEAST_TRAVEL = 4.0 * TICS / 2  # map units a frame, for a motion that is not a turn; unhindered is over twice that
LEAST_DEPTH = 5  # of 255: the median depth below which the view is a wall at the nose


def _game(scene: str, seed: int) -> Any:
    import vizdoom as vzd

    root = vzd.__path__[0]
    game = vzd.DoomGame()
    game.set_doom_game_path(f"{root}/freedoom2.wad")
    game.set_doom_scenario_path(f"{root}/scenarios/{SCENARIOS[scene]}.wad")
    game.set_doom_map("map01")
    game.set_screen_resolution(vzd.ScreenResolution.RES_400X300)
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_depth_buffer_enabled(True)
    for what in ("hud", "weapon", "crosshair", "messages", "particles", "decals", "effects_sprites"):
        getattr(game, f"set_render_{what}")(False)
    button, variable = vzd.Button, vzd.GameVariable
    game.set_available_buttons(
        [button.MOVE_FORWARD, button.MOVE_BACKWARD, button.MOVE_LEFT, button.MOVE_RIGHT, button.TURN_LEFT_RIGHT_DELTA]
    )
    game.set_available_game_variables([variable.POSITION_X, variable.POSITION_Y])
    game.set_seed(seed)
    game.set_episode_timeout(0)
    game.add_game_args("-nomonsters +sv_cheats 1 +sv_norespawn 1")
    game.init()
    return game


def _shrink(frame: np.ndarray) -> np.ndarray:
    """The centre 256x384 of a 300x400 frame, averaged over 2x2 pixels: uint8 [3, HEIGHT, WIDTH]."""
    centre = frame[22:278, 8:392].astype(np.uint16)
    total = centre[0::2, 0::2] + centre[1::2, 0::2] + centre[0::2, 1::2] + centre[1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint8).transpose(2, 0, 1)


def clips(scene: int, seed: int, frames: int) -> Iterator[tuple[np.ndarray, int]]:
    """Endless (clip uint8 [frames, 3, HEIGHT, WIDTH], motion index) of one scene."""
    rng = random.Random(seed)
    game = _game(SCENES[scene], seed)

    def fresh() -> None:
        game.new_episode()
        game.send_game_command("god")

    def act(action: tuple[float, ...], tics: int) -> None:
        game.make_action(list(action), tics)
        if game.is_episode_finished() or game.is_player_dead():
            fresh()

    count = 0
    fresh()
    while True:
        if count % 8 == 7:
            fresh()
        count += 1
        act((0, 0, 0, 0, rng.uniform(-180, 180)), 1)
        act(ACTIONS[rng.choice(("walk forward", "step left", "step right"))], rng.randint(0, 24))
        act((0, 0, 0, 0, rng.uniform(-180, 180)), 1)
        motion = rng.randrange(len(MOTIONS))
        action = ACTIONS[MOTIONS[motion]]
        act(action, 8)  # up to speed
        path, depths, images = [], [], []
        for _ in range(frames):
            state = game.get_state()
            if state is None:
                break
            path.append(state.game_variables.copy())
            depths.append(np.median(state.depth_buffer))
            images.append(_shrink(state.screen_buffer))
            game.make_action(list(action), TICS)
            if game.is_episode_finished():
                break
        if game.is_episode_finished() or game.is_player_dead():
            fresh()
        if len(images) < frames:
            continue
        steps = np.linalg.norm(np.diff(np.stack(path), axis=0), axis=1)
        turning = MOTIONS[motion].startswith("turn")
        if (turning and steps.max() > 2 * LEAST_TRAVEL) or (not turning and steps.min() < LEAST_TRAVEL):
            continue
        if min(depths) < LEAST_DEPTH:
            continue
        yield np.stack(images), motion
