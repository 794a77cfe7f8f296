// SPDX-License-Identifier: Apache-2.0
// A simulated camera with a nodding face on the user's colour, so that pictures show who is who.
(colour) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 640, height: 360 });
    const pen = canvas.getContext("2d");
    const fill = (style, x, y, radius) => {
        pen.fillStyle = style;
        pen.beginPath();
        pen.arc(x, y, radius, 0, 2 * Math.PI);
        pen.fill();
    };
    const draw = () => {
        const nod = 6 * Math.sin(Date.now() / 300);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 640, 360);
        fill("#2b3440", 320, 400, 150);
        fill("#f2c9a0", 320, 170 + nod, 90);
        fill("#2b3440", 288, 155 + nod, 9);
        fill("#2b3440", 352, 155 + nod, 9);
        pen.strokeStyle = "#2b3440";
        pen.lineWidth = 7;
        pen.beginPath();
        pen.arc(320, 180 + nod, 42, 0.2 * Math.PI, 0.8 * Math.PI);
        pen.stroke();
    };
    draw();
    setInterval(draw, 100);
    const devices = navigator.mediaDevices;
    const real = devices.getUserMedia.bind(devices);
    devices.getUserMedia = async (wanted) => {
        const stream = wanted.audio ? await real({ audio: wanted.audio }) : new MediaStream();
        if (wanted.video) stream.addTrack(canvas.captureStream(10).getVideoTracks()[0]);
        return stream;
    };
}
