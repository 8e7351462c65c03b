// Numbers out of base64, heat out of its 256 levels: the other side of analyze/report/packing.py.
"use strict";
granary.packed = (() => {
  const FORMS = { f4: Float32Array, i4: Int32Array, u2: Uint16Array, u1: Uint8Array };

  function bytes(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text);
    const found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }

  // The array that was packed in this form.
  function numbers(text, form) {
    const found = bytes(text);
    return new FORMS[form](found.buffer, 0, found.byteLength / FORMS[form].BYTES_PER_ELEMENT);
  }

  // z at each of `total` tokens; see packed_heat.
  function heat(text, peak, total) {
    const values = new Float32Array(total);
    const data = bytes(text.slice(1));
    const unit = peak / 255;
    if (text[0] === "d") {
      data.forEach((level, place) => (values[place] = level * unit));
      return values;
    }
    for (let place = -1, cursor = 0; cursor < data.length; cursor += 2) {
      let gap = 0;
      let shift = 0;
      for (; data[cursor] & 128; cursor++, shift += 7) gap |= (data[cursor] & 127) << shift;
      place += (gap | (data[cursor] << shift)) + 1;
      values[place] = data[cursor + 1] * unit;
    }
    return values;
  }

  return { numbers, heat };
})();
